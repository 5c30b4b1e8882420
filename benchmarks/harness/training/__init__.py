"""Small models of our own, trained for their tensors. Needs torch and mlxtend."""
