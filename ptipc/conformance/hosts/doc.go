// Package hosts checks from outside whether a host does what spec/ptipc.md demands of it.
//
// The suite is the child. It runs the host once for each case, with an executable as its
// transport that lies, stalls, floods, crashes, forks or ignores signals, and looks at
// what the host does to it, says to it, and leaves behind:
//
//	report, err := hosts.Run(ctx, hosts.Subject{
//		Command: []string{"./myhost", "{config}"},
//		Child:   []string{self, "conform-child"}, // calls hosts.Child
//	}, hosts.Options{})
//	if err != nil {
//		return err // the suite itself could not work
//	}
//	fmt.Print(report)
//
// The results are those of package conformance, and so are the ways to write them. A case
// is named by the clause that it is about, such as LIFE-5/setsid. What cannot be had from
// a host (it has no upstream proxy, it makes its connections when it wants) could not
// run, and says why. Processes are looked at in Linux's /proc; elsewhere nothing runs.
package hosts
