"""What the compiler leaves behind, to be looked at: programs as data, bundles, and the tools that read them."""
