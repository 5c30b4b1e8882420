"""A small Flower app: a perceptron in plain JAX on MNIST."""
