"""A Flower app whose nodes stop where a test wants to kill something, and whose run resumes."""
