-- Which measurements are in which pack, as ranges of seq: those of a pack that was imported, and of one that was made to
-- be pushed. Noted before a push, so that a row counts as shared where its pack is found on the remote, and only there.
CREATE TABLE packed (
    pack VARCHAR NOT NULL,              -- SHA-256 of the pack's bytes
    first_seq BIGINT NOT NULL,
    last_seq BIGINT NOT NULL            -- included
);
