"""Records of measurements, their files, and figures derived from them."""
