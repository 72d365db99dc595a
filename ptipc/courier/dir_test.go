package courier

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"

	"pthost/ptipc"
	"pthost/ptipc/stdio"
)

// quick limits make a test wait less for what takes its time.
var quick = dirLimits{settle: 20 * time.Millisecond, look: 100 * time.Millisecond, notify: fsnotify.NewWatcher}

func openTest(t *testing.T, path string, o Options, limits dirLimits) *Dir {
	t.Helper()
	d, err := openDir(path, o, limits)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func list(t *testing.T, path ...string) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

// put writes a file into in, as somebody does who writes it elsewhere first.
func put(t *testing.T, path, name, text string) {
	t.Helper()
	temporary := filepath.Join(path, "put")
	if err := os.WriteFile(temporary, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temporary, filepath.Join(path, inDir, name)); err != nil {
		t.Fatal(err)
	}
}

// A message goes from a client to a server and its answer back, carried by hand
// (SIG-1, SIG-2).
func TestDirBothWays(t *testing.T) {
	clientPath, serverPath := filepath.Join(t.TempDir(), "new", "client"), t.TempDir()
	client := openTest(t, clientPath, Options{}, defaultDirLimits)
	server := openTest(t, serverPath, Options{Server: true}, defaultDirLimits)

	send(t, client, ptipc.Message{Peer: "nobody", Body: ptipc.Opaque(`{"offer":1}`)})
	sent := list(t, clientPath, outDir)
	if len(sent) != 1 || !strings.HasSuffix(sent[0], ".json") {
		t.Fatal(sent)
	}
	if text, _ := os.ReadFile(filepath.Join(clientPath, outDir, sent[0])); string(text) != `{"body":{"offer":1}}`+"\n" {
		t.Errorf("%s", text)
	}
	for path, mode := range map[string]fs.FileMode{filepath.Join(outDir, sent[0]): 0o600, outDir: 0o700, inDir: 0o700, "": 0o700} {
		if info, err := os.Stat(filepath.Join(clientPath, path)); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%q: %v, %v", path, info.Mode(), err)
		}
	}
	carry := func(from, to, name string) {
		if err := os.Rename(filepath.Join(from, outDir, list(t, from, outDir)[0]), filepath.Join(to, inDir, name)); err != nil {
			t.Fatal(err)
		}
	}
	carry(clientPath, serverPath, "Alice's laptop.json")
	m := receive(t, server)
	if m.Peer != "Alice's laptop" || string(m.Body) != `{"offer":1}` {
		t.Fatalf("%q %s", m.Peer, m.Body)
	}
	send(t, server, ptipc.Message{Peer: m.Peer, Body: ptipc.Opaque(`{"answer":2}`)})
	carry(serverPath, clientPath, "answer.json")
	if m := receive(t, client); m.Peer != "" || string(m.Body) != `{"answer":2}` {
		t.Errorf("%q %s", m.Peer, m.Body)
	}
	put(t, serverPath, "b.json", " {\n \"body\": {},\n \"peer\": \"p1\"\n}\r\n")
	if m := receive(t, server); m.Peer != "p1" {
		t.Errorf("%q", m.Peer)
	}
	if names := list(t, serverPath, inDir); len(names) > 0 {
		t.Error("left in in:", names)
	}
	if names := list(t, serverPath, doneDir); len(names) != 2 || !strings.HasSuffix(names[0], "-Alice's laptop.json") {
		t.Error("in done:", names)
	}
}

// Messages that are there at the start come in the order of their names, many at a
// time, each once.
func TestDirStart(t *testing.T) {
	const files = maxFiles + 50
	path := t.TempDir()
	d, err := OpenDir(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	for i := range files {
		put(t, path, fmt.Sprintf("%05d.json", i), fmt.Sprintf(`{"body":{"n":%d}}`, i))
	}
	d = openTest(t, path, Options{}, defaultDirLimits)
	seen := map[string]bool{}
	before := ""
	for i := range files {
		body := string(receive(t, d).Body)
		if seen[body] {
			t.Fatalf("%s came twice", body)
		}
		seen[body] = true
		// What is read of so many is anything; that is in order.
		if i < maxFiles && len(body) == len(before) && body < before {
			t.Fatalf("%s came after %s", body, before)
		}
		before = body
	}
	if names := list(t, path, doneDir); len(names) != maxFiles {
		t.Errorf("%d files in done, want %d", len(names), maxFiles)
	}
}

// Names sort in the order of sending, and nobody ever sees a part of a file.
func TestDirSend(t *testing.T) {
	path := t.TempDir()
	d := openTest(t, path, Options{}, defaultDirLimits)
	const messages = 30
	for i := range messages {
		send(t, d, message(i))
	}
	for i, name := range list(t, path, outDir) {
		text, err := os.ReadFile(filepath.Join(path, outDir, name))
		if want := fmt.Sprintf(`{"body":{"n":%d}}`+"\n", i); err != nil || string(text) != want {
			t.Fatalf("file %d is %s, %v", i, text, err)
		}
	}
	var senders sync.WaitGroup
	for range 4 {
		senders.Go(func() {
			for range 10 {
				if err := d.Send(t.Context(), message(1)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	senders.Wait()
	if names := list(t, path, outDir); len(names) != messages+40 || slices.ContainsFunc(names, func(name string) bool { return !isMessage(name) }) {
		t.Error(names)
	}
	large := ptipc.Message{Body: ptipc.Opaque(`{"a":"` + strings.Repeat("x", stdio.MaxSignal) + `"}`)}
	if err := d.Send(t.Context(), large); err == nil || !strings.Contains(err.Error(), "SIG-4") {
		t.Error(err)
	}
}

// SIG-4: messages that nobody takes away do not fill the disk, and what somebody else
// has put there stays.
func TestDirBounds(t *testing.T) {
	path := t.TempDir()
	out := filepath.Join(path, outDir)
	if err := os.Mkdir(out, 0o700); err != nil {
		t.Fatal(err)
	}
	old := func(i int) string { return fmt.Sprintf("20200101T000000.%09dZ-000001.json", i) }
	for i := range maxFiles + 1 {
		if err := os.WriteFile(filepath.Join(out, old(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	kept := []string{"1-note.txt", "19990101.json", ".hidden"}
	for _, name := range append(kept, ".x.json.tmp") {
		if err := os.WriteFile(filepath.Join(out, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	logged, log := newRecords()
	d := openTest(t, path, Options{Log: log}, defaultDirLimits)
	send(t, d, message(1))
	names := list(t, path, outDir)
	for _, name := range kept {
		if !slices.Contains(names, name) {
			t.Errorf("%s is gone", name)
		}
	}
	if len(names) != maxFiles+len(kept) || slices.Contains(names, old(0)) || slices.Contains(names, old(1)) || !slices.Contains(names, old(2)) {
		t.Errorf("%d files, the first %q", len(names), names[:5])
	}
	logged.await(t, "WARN", "dropped", "count=2")
}

// A file that is written in place is taken when it is complete.
func TestDirHalfWritten(t *testing.T) {
	path := t.TempDir()
	limits := quick
	limits.settle = patience
	d := openTest(t, path, Options{}, limits)
	f, err := os.Create(filepath.Join(path, inDir, "a.json"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(`{"body":{"n":`); err != nil {
		t.Fatal(err)
	}
	put(t, path, "b.json", `{"body":{"n":2}}`)
	if got := string(receive(t, d).Body); got != `{"n":2}` {
		t.Fatal(got) // and a.json, which comes before it, has been looked at
	}
	if _, err := f.WriteString(`1}}`); err != nil {
		t.Fatal(err)
	}
	if got := string(receive(t, d).Body); got != `{"n":1}` {
		t.Error(got)
	}
	if bad := list(t, path, badDir); len(bad) > 0 {
		t.Error(bad)
	}
}

// What is no message goes away with its reason, and does not hold up what is.
func TestDirRefuses(t *testing.T) {
	path := t.TempDir()
	logged, log := newRecords()
	d := openTest(t, path, Options{Server: true, Log: log}, quick)
	in := filepath.Join(path, inDir)
	secret := filepath.Join(t.TempDir(), "hunter2")
	if err := os.WriteFile(secret, []byte(`{"body":{"hunter2":1}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, reason string
		make         func(file string) error
	}{
		{"text.json", "is not JSON", write("hunter2")},
		{"empty.json", "is missing", write("")},
		{"list.json", "is a list", write(`{"body":["hunter2"]}`)},
		{"cut.json", "is not JSON", write(`{"body":{"a":"hunter2`)},
		{"large.json", "longer than 32768", write(strings.Repeat(" ", 1<<20) + `{"body":{}}`)},
		{"large-peer.json", "SIG-4", write(`{"body":{"a":"` + strings.Repeat("x", stdio.MaxSignal-21) + `"}}`)},
		{"link.json", "not a regular file", func(file string) error { return os.Symlink(secret, file) }},
		{"dangling.json", "not a regular file", func(file string) error { return os.Symlink("/nowhere", file) }},
		{"loop.json", "not a regular file", func(file string) error { return os.Symlink(filepath.Join(in, "loop.json"), file) }},
		{"pipe.json", "not a regular file", makePipe},
		{strings.Repeat("n", 250) + ".json", "is not JSON", write("x")},
		{"bytes\xff.json", "not UTF-8", write(`{"body":{}}`)},
	} {
		temporary := filepath.Join(path, "put") // nothing is seen before it is complete
		err := c.make(temporary)
		if err == nil {
			err = os.Rename(temporary, filepath.Join(in, c.name))
		}
		if err != nil {
			t.Logf("%q cannot be made here: %v", c.name, err)
			continue
		}
		line := logged.await(t, "WARN", "not a message", c.reason)
		if strings.Contains(line, "hunter2") {
			t.Error(line)
		}
		put(t, path, "good.json", `{"body":{"n":1}}`)
		receive(t, d)
	}
	if names := list(t, path, inDir); len(names) > 0 {
		t.Error("left in in:", names)
	}
	if bad := list(t, path, badDir); len(bad) < 8 {
		t.Error("in bad:", bad)
	}
	// A link was moved and not followed.
	if text, err := os.ReadFile(secret); err != nil || !strings.Contains(string(text), "hunter2") {
		t.Errorf("%s, %v", text, err)
	}

	// Others are nobody's business.
	for _, name := range []string{"note.txt", ".hidden.json", "x.json.tmp", "x.JSON"} {
		if err := write("x")(filepath.Join(in, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(in, "directory.json"), 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, path, "good.json", `{"body":{"n":1}}`)
	receive(t, d)
	if names := list(t, path, inDir); len(names) != 5 {
		t.Error(names)
	}
	if n := logged.count("WARN"); n > 0 {
		t.Errorf("%d warnings", n)
	}
}

func write(text string) func(file string) error {
	return func(file string) error { return os.WriteFile(file, []byte(text), 0o600) }
}

// A directory that goes away is missed and waited for, whichever it is.
func TestDirVanishes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d")
	logged, log := newRecords()
	d := openTest(t, path, Options{Log: log}, quick)
	again := func(n int) {
		t.Helper()
		put(t, path, "a.json", fmt.Sprintf(`{"body":{"n":%d}}`, n))
		if got := string(receive(t, d).Body); got != fmt.Sprintf(`{"n":%d}`, n) {
			t.Fatal(got)
		}
		send(t, d, message(n))
	}
	again(1)
	// Those in it are made again. The receiving one is, when the courier has seen it.
	for _, name := range []string{outDir, doneDir, badDir} {
		if err := os.RemoveAll(filepath.Join(path, name)); err != nil {
			t.Fatal(err)
		}
		again(2)
	}
	if err := os.Rename(path, path+"-gone"); err != nil {
		t.Fatal(err)
	}
	logged.await(t, "WARN", "cannot come in")
	if err := d.Send(t.Context(), message(3)); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if n := logged.count("WARN"); n > 1 {
		t.Errorf("the same trouble was logged %d times more", n)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("the directory itself was made again: it could be a mount point")
	}
	if err := os.MkdirAll(filepath.Join(path, inDir), 0o700); err != nil {
		t.Fatal(err)
	}
	logged.await(t, "INFO", "can come in again")
	again(4)

	// Another in its place.
	if err := os.Rename(path, path+"-old"); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(path, inDir), 0o700); err != nil {
		t.Fatal(err)
	}
	again(5)

	// One that is no directory: nothing is received that could not be moved.
	if err := os.RemoveAll(filepath.Join(path, doneDir)); err != nil {
		t.Fatal(err)
	}
	if err := write("")(filepath.Join(path, doneDir)); err != nil {
		t.Fatal(err)
	}
	put(t, path, "a.json", `{"body":{"n":6}}`)
	logged.await(t, "WARN", "cannot come in", doneDir)
	if names := list(t, path, inDir); !slices.Equal(names, []string{"a.json"}) {
		t.Error(names)
	}
	if err := os.Remove(filepath.Join(path, doneDir)); err != nil {
		t.Fatal(err)
	}
	if got := string(receive(t, d).Body); got != `{"n":6}` {
		t.Error(got)
	}
}

// Without signs from the system messages come in too.
func TestDirWithoutSigns(t *testing.T) {
	logged, log := newRecords()
	limits := quick
	limits.notify = func() (*fsnotify.Watcher, error) { return nil, errors.New("no more of these") }
	path := t.TempDir()
	d := openTest(t, path, Options{Log: log}, limits)
	logged.await(t, "WARN", "does not tell", "no more of these")
	put(t, path, "a.json", `{"body":{"n":1}}`)
	receive(t, d)

	// And where it has none left for this directory.
	events, err := fsnotify.NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	if err := events.Close(); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(filepath.Join(path, inDir))
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	w := watcher{Dir: d, events: events}
	if err := w.follow(in); err != nil || w.events != nil {
		t.Errorf("%v, %v", w.events, err)
	}
	logged.await(t, "WARN", "does not tell")
}

// What was not received is there for the next time.
func TestDirCloseGivesBack(t *testing.T) {
	logged, log := newRecords()
	path := t.TempDir()
	d, err := OpenDir(path, Options{Log: log})
	if err != nil {
		t.Fatal(err)
	}
	put(t, path, "a.json", `{"body":{"n":1}}`)
	logged.await(t, "a message came in")
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if names := list(t, path, inDir); !slices.Equal(names, []string{"a.json"}) {
		t.Error(names)
	}
	d = openTest(t, path, Options{}, defaultDirLimits)
	receive(t, d)
}

func TestOpenDirRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := write("")(file); err != nil {
		t.Fatal(err)
	}
	if d, err := OpenDir(file, Options{}); err == nil {
		t.Errorf("%v", d)
	}
	path := t.TempDir()
	if err := os.Symlink(t.TempDir(), filepath.Join(path, inDir)); err != nil {
		t.Skip("this system has no symbolic links:", err)
	}
	if d, err := OpenDir(path, Options{}); err == nil || !strings.Contains(err.Error(), inDir) {
		t.Errorf("%v, %v", d, err)
	}
}

func TestDirLeavesNothing(t *testing.T) {
	cycle := func() {
		path := t.TempDir()
		d, err := OpenDir(path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		send(t, d, message(1))
		put(t, path, "a.json", `{"body":{"n":1}}`)
		receive(t, d)
		put(t, path, "b.json", `{"body":`)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	cycle()
	before := descriptors()
	for range 10 {
		cycle()
	}
	if after := descriptors(); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// FuzzFile: no file makes the reader fail badly, and what it takes can go over the
// control lines.
func FuzzFile(f *testing.F) {
	for _, seed := range []struct{ name, text string }{
		{"a", `{"body":{}}`},
		{"Alice's laptop", " {\n\"body\" : {\"a\":[1]},\"peer\":\"p1\"}\r\n"},
		{"b", `{"body":{},"peer":1}`},
		{"c", `{"body":{"a":1,"a":2}}`},
		{"d\xff", `{"body":{}}`},
		{"e", "\xef\xbb\xbf{\"body\":{}}"},
		{"f", `{"body":{"a":"` + strings.Repeat("x", 40_000) + `"}}`},
		{"g", `[`},
		{"h", ""},
	} {
		f.Add(seed.name, []byte(seed.text), true)
	}
	root, err := os.OpenRoot(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	defer root.Close()
	f.Fuzz(func(t *testing.T, name string, text []byte, server bool) {
		if err := root.WriteFile("file", text, 0o600); err != nil {
			t.Fatal(err)
		}
		m, err := readFile(root, "file", name+fileSuffix, Options{Server: server})
		if err != nil {
			if m.Peer != "" && m.Body == nil || len(err.Error()) > 300 {
				t.Fatalf("%+v with error %v", m, err)
			}
			return
		}
		if server && m.Peer == "" && name != "" || !server && m.Peer != "" {
			t.Fatalf("server %t: peer %q", server, m.Peer)
		}
		for _, line := range []stdio.Message{stdio.CMessage{Message: m}, stdio.SMessage{Message: m}} {
			if _, err := stdio.Append(nil, line); err != nil {
				t.Fatalf("%q of %q: %v", text, name, err)
			}
		}
	})
}
