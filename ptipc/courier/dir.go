package courier

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"

	"pthost/ptipc"
	"pthost/ptipc/stdio"
)

// The directories in a Dir's own.
const (
	outDir  = "out"
	inDir   = "in"
	doneDir = "done"
	badDir  = "bad"
)

const (
	fileSuffix = ".json"
	tempSuffix = ".tmp"
	// maxFiles is how many files out, done and bad hold each, and how many of in are
	// looked at at once.
	maxFiles = 1000
	// maxFile leaves room for the white space that an editor puts around a message.
	maxFile = stdio.MaxSignal + 1024
	// gather is how long changes of the directory are gathered before it is read.
	gather = 50 * time.Millisecond
	// settle is how long a file that cannot be read must stay as it is until that
	// counts as its fault: somebody may be writing it.
	settle = time.Second
	// look is how often in is read without a sign of a change: file systems of other
	// machines give none.
	look = 5 * time.Second
)

// A Dir carries messages as files. Its methods may be called from several goroutines.
type Dir struct {
	path    string
	options Options
	log     *slog.Logger
	in      *inbox
	running sync.WaitGroup

	mu   sync.Mutex // held to write
	sent uint64
}

var _ ptipc.Signals = (*Dir)(nil)

// OpenDir returns a courier that works in the directory at path, for the owner alone;
// what is not there yet is made. No other courier may use it at the same time. It has
// four directories:
//
//   - out has the outgoing messages, a file NAME.json each, never seen half written;
//     in the order of their names they are in that of sending. Somebody takes them
//     away. Of more than 1,000 the oldest is dropped and logged (SIG-4).
//   - in is where somebody puts incoming messages, as regular files whose names end in
//     .json and do not begin with a dot. They wait there until the transport receives
//     them, in the order of their names. On the server's side a message without a peer
//     gets NAME of NAME.json as its peer (SIG-2).
//   - done has the files that the transport has received, the last 1,000.
//   - bad has the last 1,000 that were not messages; the reason is logged.
//
// A file that is still being written is waited for. A directory that goes away, on
// removable media for instance, is waited for too; Send fails in the meantime.
func OpenDir(path string, o Options) (*Dir, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("the directory for messages: %w", err)
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("the directory for messages: %w", err)
	}
	d := &Dir{path: path, options: o, log: o.logger(), in: newInbox(0)}
	root, err := d.open()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	removeTemporary(root)
	d.running.Go(d.watch)
	return d, nil
}

// open opens the directory, which may have been replaced since the last time, and
// makes those in it that are missing.
func (d *Dir) open() (*os.Root, error) {
	root, err := os.OpenRoot(d.path)
	if err != nil {
		return nil, fmt.Errorf("the directory for messages cannot be used: %w", err)
	}
	for _, name := range []string{outDir, inDir, doneDir, badDir} {
		err := root.Mkdir(name, 0o700)
		if errors.Is(err, fs.ErrExist) {
			var info fs.FileInfo
			if info, err = root.Stat(name); err == nil && !info.IsDir() {
				err = syscall.ENOTDIR
			}
		}
		if err != nil {
			root.Close()
			return nil, fmt.Errorf("the directory %s for messages cannot be used: %w", filepath.Join(d.path, name), err)
		}
	}
	return root, nil
}

// removeTemporary removes what a process that was killed has left half written.
func removeTemporary(root *os.Root) {
	out, err := root.Open(outDir)
	if err != nil {
		return // nothing can be left where nothing can be written; Send says so
	}
	defer out.Close()
	for {
		entries, err := out.ReadDir(maxFiles)
		for _, entry := range entries {
			if isTemporary(entry.Name()) {
				_ = root.Remove(filepath.Join(outDir, entry.Name()))
			}
		}
		if err != nil {
			return
		}
	}
}

func isTemporary(name string) bool {
	return strings.HasPrefix(name, ".") && strings.HasSuffix(name, fileSuffix+tempSuffix)
}

// isMessage holds for the names of files that are taken.
func isMessage(name string) bool {
	return strings.HasSuffix(name, fileSuffix) && !strings.HasPrefix(name, ".")
}

// Send writes the file of a message into out.
func (d *Dir) Send(ctx context.Context, m ptipc.Message) error {
	_, text, err := d.options.admit(m)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.in.open(); err != nil {
		return err
	}
	root, err := d.open()
	if err != nil {
		return err
	}
	defer root.Close()
	if err := d.write(root, append(text, '\n')); err != nil {
		return fmt.Errorf("the message cannot be written to %s: %w", filepath.Join(d.path, outDir), err)
	}
	d.prune(root, outDir)
	return nil
}

func (d *Dir) write(root *os.Root, text []byte) error {
	d.sent++
	// The number keeps names apart where the clock is coarse.
	name := fmt.Sprintf("%s-%06d%s", stamp(), d.sent, fileSuffix)
	temporary := filepath.Join(outDir, "."+name+tempSuffix)
	f, err := root.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync() // or a crash could leave the name without its contents
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = root.Rename(temporary, filepath.Join(outDir, name))
	}
	if err != nil {
		_ = root.Remove(temporary)
	}
	return err
}

// stamp is the time in a form that sorts, and that every file system takes.
func stamp() string { return time.Now().UTC().Format("20060102T150405.000000000Z") }

// prune removes the oldest files by their names, which begin with stamps, until at
// most maxFiles are left.
func (d *Dir) prune(root *os.Root, dir string) {
	f, err := root.Open(dir)
	if err != nil {
		return // gone since the last file was put there, and the others with it
	}
	names, err := f.Readdirnames(-1)
	f.Close()
	if err != nil || len(names) <= maxFiles {
		return
	}
	names = slices.DeleteFunc(names, isTemporary)
	slices.Sort(names)
	dropped := names[:max(len(names)-maxFiles, 0)]
	for _, name := range dropped {
		if err := root.RemoveAll(filepath.Join(dir, name)); err != nil {
			d.log.Warn("cannot remove an old message", "dir", dir, "file", name, "err", err)
		}
	}
	if dir == outDir && len(dropped) > 0 {
		d.log.Warn("dropped the oldest outgoing messages: nobody takes them away", "messages", len(dropped), "kept", maxFiles)
	}
}

// Receive waits for a message in a file.
func (d *Dir) Receive(ctx context.Context) (ptipc.Message, error) { return d.in.receive(ctx) }

// Close ends Receive and all later calls with an error that wraps [net.ErrClosed]. What
// has not been received stays in the directory.
func (d *Dir) Close() error {
	d.mu.Lock() // after a Send that has begun
	d.in.close()
	d.mu.Unlock()
	d.running.Wait()
	return nil
}

// watcher takes in what somebody puts into the directory in.
type watcher struct {
	*Dir
	events  *fsnotify.Watcher // nil when the system has none left
	watched fs.FileInfo       // the directory that events come from, nil for none

	names     []string             // files to look at, in their order
	unsettled map[string]unsettled // files that could not be read
	offered   *offer               // the file that the transport receives next
	trouble   string               // what was logged last about the directory
}

// unsettled is a file that could not be read, as it was.
type unsettled struct {
	info  fs.FileInfo
	since time.Time
}

// offer is a message that was read from the file at path.
type offer struct {
	message ptipc.Message
	name    string
}

func (d *Dir) watch() {
	w := watcher{Dir: d, unsettled: map[string]unsettled{}}
	var changes chan fsnotify.Event
	var faults chan error
	events, err := fsnotify.NewWatcher()
	if err != nil {
		d.log.Warn("the system does not tell of new messages, so they are looked for now and then", "dir", d.path, "every", look, "err", err)
	} else {
		defer events.Close()
		w.events, changes, faults = events, events.Events, events.Errors
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	next := time.Now() // when the timer fires
	sooner := func(wait time.Duration) {
		if at := time.Now().Add(wait); at.Before(next) {
			next = at
			timer.Reset(wait)
		}
	}
	for {
		var receiver chan<- ptipc.Message
		var message ptipc.Message
		if w.offered != nil {
			receiver, message = d.in.messages, w.offered.message
		}
		select {
		case receiver <- message:
			w.received()
		case <-changes:
			sooner(gather)
			continue
		case err := <-faults: // such as more changes than the system could tell
			d.log.Debug("the system lost changes of the directory for messages", "dir", d.path, "err", err)
			sooner(gather)
			continue
		case <-timer.C:
			next = time.Now().Add(look)
			timer.Reset(look)
			if w.offered == nil && len(w.names) == 0 {
				w.read()
			}
		case <-d.in.closed:
			return
		}
		if w.offered == nil {
			w.take()
		}
		switch {
		case w.offered != nil:
		case len(w.unsettled) > 0:
			sooner(settle)
		}
	}
}

// use runs f with the directory. What goes wrong is logged once until something else
// happens: the directory may be away for long.
func (w *watcher) use(f func(root *os.Root) error) {
	root, err := w.open()
	if err == nil {
		err = f(root)
		root.Close()
	}
	trouble := ""
	if err != nil {
		trouble = err.Error()
	}
	switch {
	case trouble == w.trouble:
	case trouble == "":
		w.log.Info("the directory for messages can be used again", "dir", w.path)
	default:
		w.log.Warn("messages cannot come in; waiting", "dir", w.path, "err", err)
	}
	w.trouble = trouble
}
