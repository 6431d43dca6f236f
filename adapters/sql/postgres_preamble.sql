-- Run with psql as a superuser:  nhi adapter postgres install NAME | psql -d postgres
\set ON_ERROR_STOP on
SELECT @create_literal@ WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = @database_literal@) \gexec
