// Package stdio reads and writes the control lines between a host and a child:
// bytes only, no processes.
//
// A child announces what it offers and answers its host:
//
//	out := stdio.NewWriter(os.Stdout)
//	out.Send(stdio.Version{Version: "1"})
//	out.Send(stdio.CMethod{
//		Name: "example", Protocol: stdio.ProtocolSOCKS5, Addr: "unix:example.sock",
//		Args: stdio.Args{{Key: stdio.ArgBound, Value: "1"}},
//	})
//	out.Send(stdio.CMethodsDone{})
//
// Whoever reads goes on after anything that is not understood, and ends with
// the stream:
//
//	in := stdio.NewReader(stdout)
//	for {
//		line, err := in.ReadLine()
//		if errors.Is(err, stdio.ErrTooLong) {
//			continue // it was skipped whole; the next one is complete
//		}
//		if err != nil {
//			return err
//		}
//		message, err := stdio.Parse(line)
//		if err != nil {
//			log.Warn("skipped a control line", "error", err)
//			continue
//		}
//		switch m := message.(type) {
//		case stdio.CMethod:
//			addr, err := localnet.ParseAddr(m.Addr)
//			...
//		case stdio.CMethodError:
//			return m
//		}
//	}
//
// Reading is tolerant where the specification asks for it, writing is strict:
// [Append] refuses what a reader could not take. Strings that come out of a
// parse are the other side's words: they can hold control characters, and
// [Log] and [Status] values any byte at all.
package stdio
