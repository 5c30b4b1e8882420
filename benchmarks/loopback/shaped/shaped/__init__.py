"""A Flower app in numpy that trains to an accuracy, and says what had crossed the link by then."""
