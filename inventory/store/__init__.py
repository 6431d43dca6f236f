"""The database engine, its schema and the one writer."""
