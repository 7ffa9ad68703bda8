"""Datasets, loaders, images on the device. Knows utils and metrics."""
