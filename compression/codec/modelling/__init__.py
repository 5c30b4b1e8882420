"""What predicts a value: fields, activities, classes, and the plan the encoder makes."""
