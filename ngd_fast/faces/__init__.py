"""Datasets of faces, their converters, and the feeds that hand batches to a training."""
