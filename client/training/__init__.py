"""The Flower mod, the node's store and the torch trainer."""
