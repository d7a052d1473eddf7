"""What runs over the calibration data tell: statistics, inputs of layers, gradients; in portions, block by block, on several processes."""
