"""A Flower app that trains the arms of a prepared simulation over a SuperLink."""
