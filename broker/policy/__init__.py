"""The Cedar engine, the facts given to it, the catalog and the decision cases."""
