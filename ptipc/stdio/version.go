package stdio

// ProtocolVersion is the version of the specification that this module speaks
// (LINE-3, ARG-5).
const ProtocolVersion = 1

// WholeTransport is the name in a CMETHOD-ERROR line that means no single factory
// but all that the transport has (LINE-8).
const WholeTransport = "_"
