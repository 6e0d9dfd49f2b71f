"""`whichlora serve`: a lab's server, which owns one store and answers over HTTP what the command line answers here."""
