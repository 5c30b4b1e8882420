"""Plans of channels, heads and layers, and the modules that they leave."""
