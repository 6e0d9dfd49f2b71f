"""Jobs for a cluster that Slurm schedules: one chain for each GPU type that it has. docs/slurm.md tells of them."""
