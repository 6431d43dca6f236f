"""Domain types, the lease table, ports and errors.

Imports the standard library only; everything else in the product may import this.
"""
