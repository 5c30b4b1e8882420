"""A small Flower app: a convolutional network on MNIST."""
