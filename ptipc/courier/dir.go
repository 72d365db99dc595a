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
	"pthost/ptipc/internal/tally"
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
)

// dirLimits say when a directory is read.
type dirLimits struct {
	// settle is how long a file that cannot be read must stay as it is until that
	// counts as its fault: somebody may be writing it.
	settle time.Duration
	// look is how often in is read without a sign of a change: file systems of other
	// machines give none.
	look time.Duration
	// notify makes what gives the signs.
	notify func() (*fsnotify.Watcher, error)
}

var defaultDirLimits = dirLimits{settle: time.Second, look: 5 * time.Second, notify: fsnotify.NewWatcher}

// A Dir carries messages as files. Its methods may be called from several goroutines.
type Dir struct {
	path    string
	options Options
	log     *slog.Logger
	limits  dirLimits
	in      *inbox
	dropped *tally.Warning
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
//     away. Of more than 1,000 the oldest is dropped (SIG-4), and the log says so.
//   - in is where somebody puts incoming messages, as regular files whose names end in
//     .json and do not begin with a dot. They wait there until the transport receives
//     them, those that came together in the order of their names. On the server's side a
//     message without a peer gets NAME of NAME.json as its peer (SIG-2).
//   - done has the files that were taken in, the last 1,000.
//   - bad has the last 1,000 that were not messages; the reason is logged.
//
// A file that is still being written is waited for. A directory that goes away, on
// removable media for instance, is waited for too; Send fails in the meantime.
func OpenDir(path string, o Options) (*Dir, error) { return openDir(path, o, defaultDirLimits) }

func openDir(path string, o Options, limits dirLimits) (*Dir, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("the directory for messages: %w", err)
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("the directory for messages: %w", err)
	}
	d := &Dir{path: path, options: o, log: o.logger(), limits: limits, in: newInbox(0)}
	d.dropped = tally.New(d.log, "dropped the oldest outgoing messages: nobody takes them away")
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

// stampLayout sorts, and every file system takes it.
const stampLayout = "20060102T150405.000000000Z"

func stamp() string { return time.Now().UTC().Format(stampLayout) }

// isStamped holds for the names that this package gives. Other files are somebody's.
func isStamped(name string) bool {
	if len(name) < len(stampLayout) {
		return false
	}
	_, err := time.Parse(stampLayout, name[:len(stampLayout)])
	return err == nil
}

// prune removes the oldest files of this package by their names until at
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
	names = slices.DeleteFunc(names, func(name string) bool { return !isStamped(name) })
	slices.Sort(names)
	dropped := names[:max(len(names)-maxFiles, 0)]
	for _, name := range dropped {
		if err := root.Remove(filepath.Join(dir, name)); err != nil {
			d.log.Warn("cannot remove an old message", "dir", dir, "file", name, "err", err)
		}
	}
	if dir == outDir && len(dropped) > 0 {
		d.dropped.Add(len(dropped), "kept", maxFiles)
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
	d.dropped.Close()
	return nil
}

// watcher takes in what somebody puts into the directory in.
type watcher struct {
	*Dir
	events  *fsnotify.Watcher // nil when the system does not tell of changes
	watched fs.FileInfo       // the directory that events come from, nil for none
	timer   *time.Timer
	next    time.Time // when the timer fires

	dirty     bool     // the directory has to be read
	names     []string // files that were found there, to be looked at
	unsettled map[string]unsettled
	offer     *offer // the message that the transport receives next
	trouble   string // what was logged last about the directory
}

// unsettled is a file that could not be read, as it was.
type unsettled struct {
	info  fs.FileInfo
	since time.Time
}

// offer is the message of a file that was called name and has been moved to path.
type offer struct {
	message    ptipc.Message
	name, path string
}

func (d *Dir) watch() {
	w := &watcher{Dir: d, unsettled: map[string]unsettled{}, dirty: true, next: time.Now().Add(d.limits.look), timer: time.NewTimer(d.limits.look)}
	defer w.timer.Stop()
	defer w.giveBack()
	events, err := d.limits.notify()
	if err != nil {
		w.blind(err)
		events = &fsnotify.Watcher{} // its channels are nil and tell nothing
	} else {
		w.events = events
		defer events.Close()
	}
	for {
		w.advance()
		var receiver chan<- ptipc.Message
		var message ptipc.Message
		if w.offer != nil {
			receiver, message = d.in.messages, w.offer.message
		}
		select {
		case receiver <- message:
			w.offer = nil
		case event := <-events.Events:
			if event.Name == w.inPath() && event.Has(fsnotify.Remove|fsnotify.Rename) {
				w.watched = nil
			}
			w.wakeIn(gather)
		case err := <-events.Errors: // more changes than the system could tell
			d.log.Debug("some changes of the directory for messages are not known", "dir", d.path, "err", err)
			w.wakeIn(gather)
		case <-w.timer.C:
			w.dirty = true
			w.next = time.Now().Add(d.limits.look)
			w.timer.Reset(d.limits.look)
		case <-d.in.closed:
			return
		}
	}
}

// wakeIn has the directory read after wait, if that is not due earlier.
func (w *watcher) wakeIn(wait time.Duration) {
	if at := time.Now().Add(wait); at.Before(w.next) {
		w.next = at
		w.timer.Reset(wait)
	}
}

func (w *watcher) inPath() string { return filepath.Join(w.path, inDir) }

// blind goes on without the system's help.
func (w *watcher) blind(err error) {
	w.log.Warn("the system does not tell of new messages; looking for them now and then",
		"dir", w.path, "every", w.limits.look, "err", err)
	w.events = nil
}

// advance looks for a message to offer, if there is none.
func (w *watcher) advance() {
	if w.offer != nil || !w.dirty && len(w.names) == 0 {
		return
	}
	root, err := w.open()
	if err == nil {
		for err == nil && w.offer == nil && (w.dirty || len(w.names) > 0) {
			if len(w.names) == 0 {
				err = w.read(root)
				continue
			}
			name := w.names[0]
			w.names = w.names[1:]
			err = w.take(root, name)
		}
		root.Close()
	}
	if len(w.unsettled) > 0 {
		w.wakeIn(w.limits.settle)
	}
	w.report(err)
}

// report logs trouble once until it is another or over: a directory may be away for
// long.
func (w *watcher) report(err error) {
	trouble := ""
	if err != nil {
		w.names, w.dirty = nil, false
		trouble = err.Error()
	}
	switch trouble {
	case w.trouble:
	case "":
		w.log.Info("messages can come in again", "dir", w.path)
	default:
		w.log.Warn("messages cannot come in; trying again now and then", "dir", w.path, "every", w.limits.look, "err", err)
	}
	w.trouble = trouble
}

// read finds the files to look at.
func (w *watcher) read(root *os.Root) error {
	w.dirty = false
	in, err := root.Open(inDir)
	if err != nil {
		return err
	}
	defer in.Close()
	// First of all: what comes after the reading must be told.
	if err := w.follow(in); err != nil {
		return err
	}
	var names []string
	for len(names) < maxFiles {
		entries, err := in.ReadDir(maxFiles)
		for _, entry := range entries {
			if isMessage(entry.Name()) && !entry.IsDir() {
				names = append(names, entry.Name())
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if len(names) >= maxFiles {
		w.wakeIn(gather) // for the others
	}
	slices.Sort(names)
	w.names = names
	for name := range w.unsettled {
		if _, found := slices.BinarySearch(names, name); !found {
			delete(w.unsettled, name)
		}
	}
	return nil
}

// follow has the system tell of changes of the directory that now has the name in.
func (w *watcher) follow(in *os.File) error {
	info, err := in.Stat()
	if err != nil || w.events == nil || w.watched != nil && os.SameFile(info, w.watched) {
		return err
	}
	_ = w.events.Remove(w.inPath()) // an error says that it is not watched
	switch err := w.events.Add(w.inPath()); {
	case errors.Is(err, fs.ErrNotExist):
		return err
	case err != nil:
		w.blind(err)
	default:
		w.watched = info
	}
	return nil
}

// take offers the message of a file, or does away with a file that is none.
func (w *watcher) take(root *os.Root, name string) error {
	path := filepath.Join(inDir, name)
	info, err := root.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // somebody has taken it back
	}
	if err != nil {
		return err
	}
	if _, err = readFile(root, path, name, w.options); err != nil {
		before, known := w.unsettled[name]
		switch {
		case !known || !os.SameFile(before.info, info) || before.info.Size() != info.Size() || !before.info.ModTime().Equal(info.ModTime()):
			w.unsettled[name] = unsettled{info, time.Now()}
			return nil
		case time.Since(before.since) < w.limits.settle:
			return nil
		}
		w.log.Warn("a file is not a message", "file", filepath.Join(w.path, path), "moved to", badDir, "reason", err)
		_, err := w.move(root, path, name, badDir)
		return err
	}
	delete(w.unsettled, name)
	// Moved before it is offered, so that none is received again and again because it
	// cannot be moved; and read once more, in case it has become another file.
	moved, err := w.move(root, path, name, doneDir)
	if err != nil {
		return err
	}
	message, err := readFile(root, moved, name, w.options)
	if err != nil {
		w.log.Warn("a file changed while it was read and is not a message", "file", filepath.Join(w.path, moved), "reason", err)
		return nil
	}
	w.log.Debug("a message came in", "file", name)
	w.offer = &offer{message, name, moved}
	return nil
}

// move moves a file to done or bad, under a name of its own.
func (w *watcher) move(root *os.Root, path, name, dir string) (string, error) {
	if longest := 128; len(name) > longest { // with the stamp it could be too long
		name = strings.ToValidUTF8(name[len(name)-longest:], "")
	}
	moved := filepath.Join(dir, stamp()+"-"+name)
	if err := root.Rename(path, moved); err != nil {
		return "", err
	}
	w.prune(root, dir)
	return moved, nil
}

// giveBack returns the message that was offered and not received.
func (w *watcher) giveBack() {
	if w.offer == nil {
		return
	}
	root, err := w.open()
	if err != nil {
		return // it is where its directory is
	}
	defer root.Close()
	path := filepath.Join(inDir, w.offer.name)
	if _, err := root.Lstat(path); err == nil {
		return // another has come under its name; it stays in done
	}
	if err := root.Rename(w.offer.path, path); err != nil {
		w.log.Warn("a message that was not received stays in done", "file", filepath.Join(w.path, w.offer.path), "err", err)
	}
}

// readFile reads a message from a file of the given name, which has been moved perhaps.
func readFile(root *os.Root, path, name string, o Options) (ptipc.Message, error) {
	info, err := root.Lstat(path)
	if err != nil {
		return ptipc.Message{}, err
	}
	if !info.Mode().IsRegular() {
		return ptipc.Message{}, errors.New("it is not a regular file")
	}
	// Should it have become a pipe by now, opening it must not wait.
	f, err := root.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return ptipc.Message{}, err
	}
	defer f.Close()
	// A link that has taken its place would be followed.
	if opened, err := f.Stat(); err != nil || !os.SameFile(info, opened) {
		return ptipc.Message{}, errors.New("it was replaced while it was opened")
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return ptipc.Message{}, err
	}
	if len(text) > maxFile {
		return ptipc.Message{}, fmt.Errorf("it is longer than %d bytes (SIG-4)", stdio.MaxSignal)
	}
	m, err := stdio.ParseSignal(bytes.TrimSpace(text))
	if err != nil {
		return ptipc.Message{}, err
	}
	if m.Peer == "" {
		m.Peer = strings.TrimSuffix(name, fileSuffix) // SIG-2
	}
	m, _, err = o.admit(m)
	return m, err
}
