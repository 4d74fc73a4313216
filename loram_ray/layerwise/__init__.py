"""A base run one decoder layer at a time, its hidden states on disk between the layers."""
