"""A server on loopback and many devices that fetch from it, in processes of their own."""
