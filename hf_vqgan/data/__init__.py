"""From a dataset to batches of pixels: decoding and orientation, crops, map-style datasets and streams."""
