"""What changes in the images: spectra and sharpness without a network, and scores on a network's features or logits."""
