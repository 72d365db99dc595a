// Package conformance checks from outside whether a child does what
// spec/ptipc.md demands of it.
//
// It speaks the control lines and the modified SOCKS5 with its own bytes, so that
// no tolerance of the host's can hide a fault of the child (allocations that are to be
// granted are had by package turn, those that are not by bytes of its own):
//
//	report, err := conformance.Run(ctx, conformance.Subject{
//		Path:   "/usr/lib/pt/pt-example",
//		Config: ptipc.Opaque(`{"server":"192.0.2.1:443"}`),
//	}, conformance.Options{})
//	if err != nil {
//		return err // the suite itself could not work
//	}
//	fmt.Print(report)
//	if !report.OK() {
//		return errors.New("the child fell short of a MUST")
//	}
//
// In a test, each case is a subtest:
//
//	func TestChild(t *testing.T) {
//		conformance.Test(t, conformance.Subject{Path: "./pt-example"}, conformance.Options{})
//	}
//
// A case is named by the clause that it is about, such as
// SOCKS-5/byte-by-byte. Cases of a MUST decide whether a child conforms; those of a
// SHOULD are reported. A case that cannot run, because of the machine or because it
// is about something that the child does not have, says why.
//
// Subject.Dialect says what the child speaks: the protocol of spec/ptipc.md, or one of
// those for managed transports, PT 1.0 (such as obfs4proxy) and PT 2.0 to 3.0, to which the
// suite is the parent that spec/pt1.md describes, section 5 above all:
//
//	report, err := conformance.Run(ctx, conformance.Subject{
//		Path: "obfs4proxy", Dialect: conformance.PT1, Role: conformance.Server,
//		Generate: ptipc.Opaque(`{"transport":"obfs4","listen":"127.0.0.1:0"}`),
//	}, conformance.Options{})
//
// Subject.Role says what is looked at: the client, the server, or what is generated.
// For a server the suite is the host to which connections are delivered (SRV-3), and
// the courier of its signals. A child of datagrams alone is asked what any child is, and
// what PKT demands. Some cases look at the child's sockets in
// /proc and are run on Linux alone; the one about other users of the machine
// (SOCKS-17) needs root. Clauses that bind the host have their cases in package hosts;
// those whose breach does not show have none.
package conformance
