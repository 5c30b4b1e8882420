"""Keys and who holds them: the key ring, key holders, ceremonies and the changes they sign."""
