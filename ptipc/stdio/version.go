package stdio

// ProtocolVersion is the version of the specification that this module speaks
// (LINE-3, ARG-5).
const ProtocolVersion = 1
