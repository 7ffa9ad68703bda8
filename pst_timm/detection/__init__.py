"""Object detection: torchvision's detectors over a PST pyramid, on any timm trunk. Knows checkpoints, data and engine."""
