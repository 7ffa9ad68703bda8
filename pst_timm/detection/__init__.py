"""Object detection with PST: torchvision's detectors on any timm trunk. Knows checkpoints, data and engine."""
