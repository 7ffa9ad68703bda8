"""What a model says of images, and what that tells of the model and the images. Knows checkpoints, data and engine."""
