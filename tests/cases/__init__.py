"""What tests of several subjects share: inputs, stand-ins and processes."""
