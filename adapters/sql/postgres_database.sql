-- nhi-broker: what a broker needs in a database that its recipes name.
--
-- Run once, as a superuser, in database @database@; running it again is harmless.
--
-- Any login can leave something of its own behind (a large object, a default privilege, a table
-- where its group may create): PostgreSQL then refuses to drop the role. nhi.disown hands such
-- objects to a role that nobody can use, where an administrator finds them: nothing is deleted,
-- and a function left behind on purpose runs with no rights.
BEGIN;

SET LOCAL client_min_messages = warning;

DO $nhi$
BEGIN
  IF current_database() <> @database_literal@ THEN
    RAISE EXCEPTION 'this is database %, not the one the script was made for', current_database();
  END IF;
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'nhi_quarantine') THEN
    CREATE ROLE nhi_quarantine NOLOGIN NOINHERIT;
  END IF;
END
$nhi$;

GRANT CONNECT ON DATABASE @database@ TO @login@;

CREATE SCHEMA IF NOT EXISTS nhi;
REVOKE ALL ON SCHEMA nhi FROM PUBLIC;
GRANT USAGE ON SCHEMA nhi TO @login@;

CREATE TABLE IF NOT EXISTS nhi.broker (
  tag   text NOT NULL CHECK (tag ~ '^[a-z2-7]{6}$'),
  login name NOT NULL,
  PRIMARY KEY (tag, login)
);
REVOKE ALL ON nhi.broker FROM PUBLIC, @login@;
INSERT INTO nhi.broker (tag, login) VALUES (@tag_literal@, @login_literal@) ON CONFLICT DO NOTHING;

-- Only for roles that nhi.revoke has disarmed: a live lease keeps what it owns.
CREATE OR REPLACE FUNCTION nhi.disown(p_role text) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $nhi$
BEGIN
  IF p_role IS NULL OR p_role !~ '^nhi_[a-z2-7]{6}_[a-z2-7]{16}$' THEN
    RAISE EXCEPTION 'not the name of a leased role' USING ERRCODE = 'NHI03';
  END IF;
  IF NOT EXISTS (SELECT FROM nhi.broker b WHERE b.tag = substr(p_role, 5, 6) AND b.login = session_user) THEN
    RAISE EXCEPTION 'this login does not act for that broker instance' USING ERRCODE = 'NHI04';
  END IF;
  IF EXISTS (SELECT FROM pg_roles WHERE rolname = p_role AND rolcanlogin) THEN
    RAISE EXCEPTION 'the lease is still alive' USING ERRCODE = 'NHI07';
  END IF;
  IF EXISTS (SELECT FROM pg_roles WHERE rolname = p_role) THEN
    EXECUTE format('REASSIGN OWNED BY %I TO nhi_quarantine', p_role);
    EXECUTE format('DROP OWNED BY %I', p_role);
  END IF;
END
$nhi$;

REVOKE ALL ON FUNCTION nhi.disown(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION nhi.disown(text) TO @login@;

COMMIT;
