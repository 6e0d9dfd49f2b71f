-- Bytes in managed memory at most: the state of paged optimizers, which may leave the card and which no other counter holds.
ALTER TABLE measurement ADD COLUMN managed_peak_bytes BIGINT;
