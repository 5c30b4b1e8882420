"""Coverage-guided fuzzing of the codec's decoder; see README.md."""
