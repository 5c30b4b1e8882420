"""A Flower app without training data: nodes pull the model halfway to a target each."""
