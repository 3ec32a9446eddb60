"""The pictures: what the data sets of this project are made of, and how to read and write them."""
