-- nhi-broker: what one broker needs in the PostgreSQL cluster it mints logins in.
--
-- Run once, as a superuser, in the fence database @database@; running it again is harmless and
-- is how a new version, a new group or another broker instance is added.
--
-- The broker's login gets EXECUTE on the functions below and nothing else: it cannot create,
-- alter or drop a role by itself. The functions touch only roles named nhi_<tag>_<lease> whose
-- tag belongs to the login that calls them.
BEGIN;

SET LOCAL client_min_messages = warning;

DO $nhi$
BEGIN
  IF current_database() <> @database_literal@ THEN
    RAISE EXCEPTION 'this is database %, not the fence database', current_database()
      USING HINT = 'Connect to the database that the broker''s fence_database setting names.';
  END IF;
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = @login_literal@) THEN
    CREATE ROLE @login@ LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOINHERIT;
  END IF;
END
$nhi$;
@set_password@
-- Leased logins must never reach this database: here they could take the fence's locks.
REVOKE ALL ON DATABASE @database@ FROM PUBLIC;
GRANT CONNECT ON DATABASE @database@ TO @login@;

CREATE SCHEMA IF NOT EXISTS nhi;
REVOKE ALL ON SCHEMA nhi FROM PUBLIC;
GRANT USAGE ON SCHEMA nhi TO @login@;

-- Which login may act for which broker instance.
CREATE TABLE IF NOT EXISTS nhi.broker (
  tag   text NOT NULL CHECK (tag ~ '^[a-z2-7]{6}$'),
  login name NOT NULL,
  PRIMARY KEY (tag, login)
);

-- Which groups a leased login of that instance may be made a member of.
CREATE TABLE IF NOT EXISTS nhi.allowed_group (
  tag        text NOT NULL CHECK (tag ~ '^[a-z2-7]{6}$'),
  group_name name NOT NULL,
  PRIMARY KEY (tag, group_name)
);

-- The fence: a role named here is never created again. role_oid finds its sessions even after
-- the role is dropped, when pg_stat_activity shows no name any more.
CREATE TABLE IF NOT EXISTS nhi.tombstone (
  role     name PRIMARY KEY,
  role_oid oid,
  at       timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX IF NOT EXISTS tombstone_at ON nhi.tombstone (at);

REVOKE ALL ON ALL TABLES IN SCHEMA nhi FROM PUBLIC, @login@;

INSERT INTO nhi.broker (tag, login) VALUES (@tag_literal@, @login_literal@) ON CONFLICT DO NOTHING;
DELETE FROM nhi.allowed_group WHERE tag = @tag_literal@ AND group_name <> ALL (@groups@);
INSERT INTO nhi.allowed_group (tag, group_name)
  SELECT @tag_literal@, g FROM unnest(@groups@) AS g ON CONFLICT DO NOTHING;

-- Every function starts here. Read committed matters: under repeatable read a mint that waited
-- for the lease's lock would not see the tombstone written meanwhile.
CREATE OR REPLACE FUNCTION nhi.guard(p_role text) RETURNS void
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $nhi$
BEGIN
  IF p_role IS NULL OR p_role !~ '^nhi_[a-z2-7]{6}_[a-z2-7]{16}$' THEN
    RAISE EXCEPTION 'not the name of a leased role' USING ERRCODE = 'NHI03';
  END IF;
  IF NOT EXISTS (SELECT FROM nhi.broker b WHERE b.tag = substr(p_role, 5, 6) AND b.login = session_user) THEN
    RAISE EXCEPTION 'this login does not act for that broker instance' USING ERRCODE = 'NHI04';
  END IF;
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION 'the fence needs the isolation level read committed' USING ERRCODE = 'NHI03';
  END IF;
END
$nhi$;

CREATE OR REPLACE FUNCTION nhi.mint(
  p_role text, p_group text, p_verifier text, p_now_ms bigint, p_not_after_ms bigint, p_connections integer
) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $nhi$
DECLARE
  v_clock_ms bigint := extract(epoch FROM clock_timestamp()) * 1000;
BEGIN
  PERFORM nhi.guard(p_role);
  IF p_verifier IS NULL OR p_verifier !~
     '^SCRAM-SHA-256\$[0-9]{4,6}:[A-Za-z0-9+/]{22}==\$[A-Za-z0-9+/]{43}=:[A-Za-z0-9+/]{43}=$' THEN
    RAISE EXCEPTION 'only a SCRAM-SHA-256 verifier is accepted' USING ERRCODE = 'NHI03';
  END IF;
  IF p_connections IS NULL OR p_connections NOT BETWEEN 1 AND 100 THEN
    RAISE EXCEPTION 'the connection limit lies between 1 and 100' USING ERRCODE = 'NHI03';
  END IF;
  IF p_not_after_ms IS NULL OR p_not_after_ms > v_clock_ms + @ttl_ms_max@ THEN
    RAISE EXCEPTION 'the expiry lies further ahead than this installation allows' USING ERRCODE = 'NHI03';
  END IF;
  -- A call older than this may outlive its tombstone (see nhi.reap), so it is refused.
  IF p_now_ms IS NULL OR abs(v_clock_ms - p_now_ms) > @mint_age_ms_max@ THEN
    RAISE EXCEPTION 'the mint call is too old, or the clocks of broker and server disagree'
      USING ERRCODE = 'NHI06';
  END IF;
  IF NOT EXISTS (SELECT FROM nhi.allowed_group a
                 WHERE a.tag = substr(p_role, 5, 6) AND a.group_name = p_group) THEN
    RAISE EXCEPTION 'the group is not on the allow-list of this broker instance' USING ERRCODE = 'NHI02';
  END IF;
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = p_group) THEN
    RAISE EXCEPTION 'the group does not exist' USING ERRCODE = 'NHI02';
  END IF;
  -- The mark by which nhi.revoke finds this backend if it hangs; it lasts for this transaction.
  PERFORM set_config('application_name', p_role, true);
  PERFORM pg_advisory_xact_lock(hashtextextended(p_role, 0));
  IF EXISTS (SELECT FROM nhi.tombstone t WHERE t.role = p_role) THEN
    RAISE EXCEPTION 'the lease was revoked' USING ERRCODE = 'NHI01';
  END IF;
  IF EXISTS (SELECT FROM pg_roles WHERE rolname = p_role) THEN
    RAISE EXCEPTION 'the lease was minted before' USING ERRCODE = 'NHI05';
  END IF;
  EXECUTE format(
    'CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS'
    ' CONNECTION LIMIT %s PASSWORD %L VALID UNTIL %L IN ROLE %I',
    p_role, p_connections, p_verifier,
    to_char(to_timestamp(p_not_after_ms / 1000.0) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'), p_group);
  EXECUTE format('COMMENT ON ROLE %I IS %L', p_role,
    format('nhi-broker lease lse_%s minted_ms=%s', substr(p_role, 12), v_clock_ms));
END
$nhi$;

-- Ends every session of the roles, waits until they are gone or the time is up; returns how many
-- are left. By OID: a session of a dropped role has no name. The activity view is a snapshot
-- within a transaction, hence the clearing. Not callable by the broker.
CREATE OR REPLACE FUNCTION nhi.cut_sessions(p_oids oid[], p_wait interval) RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $nhi$
DECLARE
  v_until timestamptz := clock_timestamp() + p_wait;
  v_left bigint;
BEGIN
  LOOP
    PERFORM pg_stat_clear_snapshot();
    SELECT count(pg_terminate_backend(pid)) INTO v_left FROM pg_stat_activity WHERE usesysid = ANY (p_oids);
    EXIT WHEN v_left = 0 OR clock_timestamp() > v_until;
    PERFORM pg_sleep(0.002);
  END LOOP;
  RETURN v_left;
END
$nhi$;

-- What keeps a role from being dropped is not always in reach (another database, a lock): then it
-- at least loses its groups, and login and password where no lock keeps us from that too, in the
-- transaction that fences it. Not callable by the broker.
CREATE OR REPLACE FUNCTION nhi.drop_or_disarm(p_role text) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $nhi$
DECLARE
  v_state text;
  v_group text;
BEGIN
  BEGIN
    EXECUTE format('DROP ROLE %I', p_role);
    RETURN 'dropped';
  EXCEPTION WHEN OTHERS THEN
    v_state := SQLSTATE;
  END;
  FOR v_group IN SELECT m.roleid::regrole::text FROM pg_auth_members m WHERE m.member = p_role::regrole LOOP
    BEGIN
      EXECUTE format('REVOKE %s FROM %I', v_group, p_role);
    EXCEPTION WHEN OTHERS THEN
      v_state := SQLSTATE;
    END;
  END LOOP;
  BEGIN
    EXECUTE format('ALTER ROLE %I NOLOGIN PASSWORD NULL CONNECTION LIMIT 0 VALID UNTIL ''-infinity''', p_role);
  EXCEPTION WHEN OTHERS THEN
    v_state := SQLSTATE;
  END;
  RETURN v_state;
END
$nhi$;

-- Fence, cut, drop, for a batch, in one transaction. Names are taken in order, so that two
-- batches cannot deadlock. A mint that holds a lease's lock was given up by the broker, or it
-- would not revoke: its backend is ended rather than waited for.
CREATE OR REPLACE FUNCTION nhi.revoke(p_roles text[])
RETURNS TABLE (role text, outcome text, databases text[])
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $nhi$
DECLARE
  v_role text;
  v_key bigint;
  v_oids oid[];
BEGIN
  -- What is reported dead must still be dead after a crash of the server.
  IF current_setting('synchronous_commit') = 'off' THEN
    PERFORM set_config('synchronous_commit', 'local', true);
  END IF;
  FOR v_role IN SELECT DISTINCT r FROM unnest(p_roles) AS r ORDER BY r LOOP
    PERFORM nhi.guard(v_role);
    v_key := hashtextextended(v_role, 0);
    IF NOT pg_try_advisory_xact_lock(v_key) THEN
      PERFORM pg_stat_clear_snapshot();
      PERFORM pg_terminate_backend(a.pid) FROM pg_stat_activity a
        WHERE a.application_name = v_role AND a.datname = current_database() AND a.pid <> pg_backend_pid();
      PERFORM pg_advisory_xact_lock(v_key);
    END IF;
    INSERT INTO nhi.tombstone AS t (role, role_oid)
      VALUES (v_role, (SELECT a.oid FROM pg_roles a WHERE a.rolname = v_role))
      ON CONFLICT ON CONSTRAINT tombstone_pkey
      DO UPDATE SET role_oid = coalesce(excluded.role_oid, t.role_oid);
  END LOOP;
  SELECT array_agg(t.role_oid) INTO v_oids FROM nhi.tombstone t WHERE t.role = ANY (p_roles::name[]);
  PERFORM nhi.cut_sessions(v_oids, interval '500 milliseconds');
  FOR v_role IN SELECT DISTINCT r FROM unnest(p_roles) AS r ORDER BY r LOOP
    role := v_role;
    databases := '{}';
    IF NOT EXISTS (SELECT FROM pg_roles a WHERE a.rolname = v_role) THEN
      outcome := 'absent';
    ELSE
      outcome := nhi.drop_or_disarm(v_role);
      IF outcome <> 'dropped' THEN
        SELECT coalesce(array_agg(DISTINCT d.datname::text), '{}') INTO databases
          FROM pg_shdepend s JOIN pg_database d ON d.oid = s.dbid
          WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = v_role::regrole;
      END IF;
    END IF;
    RETURN NEXT;
  END LOOP;
END
$nhi$;

-- After nhi.revoke committed: sessions that came in while it ran. Returns how many resisted.
CREATE OR REPLACE FUNCTION nhi.cut(p_roles text[]) RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $nhi$
BEGIN
  PERFORM nhi.guard(r) FROM unnest(p_roles) AS r;
  RETURN nhi.cut_sessions(
    (SELECT array_agg(t.role_oid) FROM nhi.tombstone t WHERE t.role = ANY (p_roles::name[])),
    interval '1 second');
END
$nhi$;

-- What is left of each lease, in the whole cluster.
CREATE OR REPLACE FUNCTION nhi.inspect(p_roles text[])
RETURNS TABLE (role text, role_exists boolean, can_login boolean, sessions bigint,
               tombstone_ms bigint, checked_ms bigint)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $nhi$
BEGIN
  PERFORM nhi.guard(r) FROM unnest(p_roles) AS r;
  RETURN QUERY
    WITH live AS (SELECT usesysid, count(*) AS n FROM pg_stat_activity WHERE usesysid IS NOT NULL GROUP BY usesysid)
    SELECT r, a.oid IS NOT NULL, coalesce(a.rolcanlogin, false),
           coalesce((SELECT sum(l.n) FROM live l WHERE l.usesysid IN (a.oid, t.role_oid)), 0)::bigint,
           (extract(epoch FROM t.at) * 1000)::bigint,
           (extract(epoch FROM clock_timestamp()) * 1000)::bigint
    FROM (SELECT DISTINCT u FROM unnest(p_roles) AS u) AS names(r)
    LEFT JOIN pg_roles a ON a.rolname = r
    LEFT JOIN nhi.tombstone t ON t.role = r;
END
$nhi$;

-- One page of the live roles of an instance, in order of name.
CREATE OR REPLACE FUNCTION nhi.list(p_tag text, p_after text, p_limit integer)
RETURNS TABLE (role text, created_ms bigint)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $nhi$
BEGIN
  PERFORM nhi.guard('nhi_' || p_tag || '_aaaaaaaaaaaaaaaa');
  RETURN QUERY
    SELECT a.rolname::text,
           substring(shobj_description(a.oid, 'pg_authid') FROM 'minted_ms=([0-9]{1,15})$')::bigint
    FROM pg_roles a
    WHERE a.rolname > p_after AND a.rolname < 'nhi_' || p_tag || '`'
      AND a.rolname ~ ('^nhi_' || p_tag || '_[a-z2-7]{16}$')
    ORDER BY a.rolname LIMIT least(p_limit, 1000);
END
$nhi$;

-- Forgets tombstones that nothing can need any more: nhi.mint refuses calls half as old, and the
-- role and its sessions are gone.
CREATE OR REPLACE FUNCTION nhi.reap(p_tag text) RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $nhi$
DECLARE
  v_reaped bigint;
BEGIN
  PERFORM nhi.guard('nhi_' || p_tag || '_aaaaaaaaaaaaaaaa');
  WITH old AS (
    SELECT t.role FROM nhi.tombstone t
    WHERE t.at < clock_timestamp() - interval '@tombstone_ms_min@ milliseconds'
      AND t.role ~ ('^nhi_' || p_tag || '_')
      AND NOT EXISTS (SELECT FROM pg_roles a WHERE a.rolname = t.role)
      AND NOT EXISTS (SELECT FROM pg_stat_activity s WHERE s.usesysid = t.role_oid)
    ORDER BY t.at LIMIT 10000)
  DELETE FROM nhi.tombstone t USING old WHERE t.role = old.role;
  GET DIAGNOSTICS v_reaped = ROW_COUNT;
  RETURN v_reaped;
END
$nhi$;

-- What the broker's start-up check asks. `subject` is a group or a database, or empty.
CREATE OR REPLACE FUNCTION nhi.report(p_tag text, p_groups text[], p_databases text[])
RETURNS TABLE (item text, subject text, ok boolean)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $nhi$
DECLARE
  v_super boolean := (SELECT rolsuper FROM pg_roles WHERE rolname = current_user);
BEGIN
  RETURN QUERY SELECT 'instance', '', EXISTS (
    SELECT FROM nhi.broker b WHERE b.tag = p_tag AND b.login = session_user);
  RETURN QUERY SELECT 'login_is_plain', '', NOT (a.rolsuper OR a.rolcreaterole OR a.rolbypassrls OR a.rolreplication)
    FROM pg_roles a WHERE a.rolname = session_user;
  RETURN QUERY SELECT 'owner_creates_roles', current_user::text, v_super OR a.rolcreaterole
    FROM pg_roles a WHERE a.rolname = current_user;
  RETURN QUERY SELECT 'owner_ends_sessions', current_user::text,
    v_super OR pg_has_role(current_user, 'pg_signal_backend', 'MEMBER');
  RETURN QUERY SELECT 'fence_is_closed', '', NOT EXISTS (
    SELECT FROM pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) x
    WHERE d.datname = current_database() AND x.grantee = 0 AND x.privilege_type = 'CONNECT');
  RETURN QUERY SELECT 'group_exists', g, EXISTS (SELECT FROM pg_roles a WHERE a.rolname = g)
    FROM unnest(p_groups) AS g;
  RETURN QUERY SELECT 'group_allowed', g, EXISTS (
    SELECT FROM nhi.allowed_group l WHERE l.tag = p_tag AND l.group_name = g) FROM unnest(p_groups) AS g;
  RETURN QUERY SELECT 'group_is_plain', a.rolname::text,
    NOT (a.rolsuper OR a.rolcreaterole OR a.rolcreatedb OR a.rolbypassrls OR a.rolreplication)
    FROM pg_roles a WHERE a.rolname = ANY (p_groups::name[]);
  RETURN QUERY SELECT 'group_grantable', a.rolname::text, v_super OR pg_has_role(current_user, a.oid, 'MEMBER WITH ADMIN OPTION')
    FROM pg_roles a WHERE a.rolname = ANY (p_groups::name[]);
  RETURN QUERY SELECT 'group_kept_out', a.rolname::text, NOT has_database_privilege(a.oid, current_database(), 'CONNECT')
    FROM pg_roles a WHERE a.rolname = ANY (p_groups::name[]);
  RETURN QUERY SELECT 'database_exists', d, EXISTS (SELECT FROM pg_database b WHERE b.datname = d)
    FROM unnest(p_databases) AS d;
END
$nhi$;

CREATE OR REPLACE FUNCTION nhi.version() RETURNS integer
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS 'SELECT @version@';

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA nhi FROM PUBLIC, @login@;
GRANT EXECUTE ON FUNCTION
  nhi.mint(text, text, text, bigint, bigint, integer), nhi.revoke(text[]), nhi.cut(text[]),
  nhi.inspect(text[]), nhi.list(text, text, integer), nhi.reap(text),
  nhi.report(text, text[], text[]), nhi.version()
  TO @login@;

COMMIT;
