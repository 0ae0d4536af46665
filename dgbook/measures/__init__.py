"""What is measured on images: spectra, detail, judges and their networks, distances, statistics."""
