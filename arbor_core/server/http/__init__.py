"""What all routes share: keys, errors, bodies, the OpenAPI document, connections."""
