"""A small Flower app: boosted trees by XGBoost on the breast cancer data of scikit-learn."""
