-- What was measured. One row is one measurement and never changes. No key or index is declared: ids are kept unique by
-- how rows are added (by one writer at a time, each row only if its id is absent), which costs a third of the file size
-- of an index and leaves nothing but plain appends to replay after a crash.
CREATE TABLE measurement (
    id VARCHAR NOT NULL,                -- SHA-256 of the content without host and user name
    seq BIGINT NOT NULL,                -- order of arrival in this store; not part of the content
    workload_id VARCHAR NOT NULL,       -- SHA-256 of the workload, its label left out
    config_id VARCHAR NOT NULL,         -- table config
    workload VARCHAR NOT NULL,          -- JSON of the workload without its config
    model VARCHAR NOT NULL,             -- from here to quantization: copies out of workload, to filter by
    task VARCHAR NOT NULL,
    phase VARCHAR NOT NULL,
    method VARCHAR NOT NULL,
    "precision" VARCHAR NOT NULL,
    quantization VARCHAR NOT NULL,
    evidence VARCHAR NOT NULL,
    device VARCHAR NOT NULL,
    outcome VARCHAR NOT NULL,
    error VARCHAR NOT NULL,
    measured_at TIMESTAMP,              -- UTC
    source VARCHAR NOT NULL,
    notes VARCHAR NOT NULL,
    gpu VARCHAR,
    gpu_name VARCHAR,
    gpu_total_bytes BIGINT,
    compute_capability VARCHAR,
    driver_version VARCHAR,
    cpu_name VARCHAR,
    os_name VARCHAR,
    python_version VARCHAR,
    whichlora_version VARCHAR,
    versions VARCHAR NOT NULL,          -- JSON object: library to version
    trainable_params BIGINT,
    weights_bytes BIGINT,
    model_bytes BIGINT,
    allocated_peak_bytes BIGINT,
    reserved_peak_bytes BIGINT,
    process_bytes BIGINT,
    phase_peaks VARCHAR NOT NULL,       -- JSON object: phase to its peaks
    step_samples_s DOUBLE[],
    step_min_s DOUBLE,
    step_mean_s DOUBLE,
    step_median_s DOUBLE,
    step_max_s DOUBLE,
    prefill_samples_s DOUBLE[],
    prefill_min_s DOUBLE,
    prefill_mean_s DOUBLE,
    prefill_median_s DOUBLE,
    prefill_max_s DOUBLE,
    decode_per_token_samples_s DOUBLE[],
    decode_per_token_min_s DOUBLE,
    decode_per_token_mean_s DOUBLE,
    decode_per_token_median_s DOUBLE,
    decode_per_token_max_s DOUBLE
);

-- Model configs, each once.
CREATE TABLE config (
    id VARCHAR NOT NULL,                -- SHA-256 of config
    config VARCHAR NOT NULL             -- canonical JSON
);

-- The names that a measurement may be shared without; what is unknown has no row. Apart from the measurement, so that
-- joining a store with a copy that lacks names is a union in either order.
CREATE TABLE origin (
    measurement_id VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,              -- host_name or user_name
    name VARCHAR NOT NULL
);

CREATE TABLE whichlora_migration (
    number INTEGER NOT NULL,
    name VARCHAR NOT NULL,
    applied_at TIMESTAMP NOT NULL       -- UTC
);
