"""`quantkit compare`: what every scheme costs and gains one model on one machine, measured."""
