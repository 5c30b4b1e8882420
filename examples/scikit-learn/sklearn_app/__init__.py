"""A small Flower app: scikit-learn's MLPClassifier on MNIST."""
