"""The names that other programs give our weights."""
