"""The fields' official metrics, and intervals around them."""
