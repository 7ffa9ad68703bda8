"""Object detection: torchvision's FCOS and RetinaNet over PST pyramids, trained by the ordinary engine."""
