"""Replies as they come: understood, held to what was sent, and made what strategies see."""
