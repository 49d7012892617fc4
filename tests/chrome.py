"A headless Chromium, spoken to over its own protocol: no driver, no package beyond websocket-client."
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request

PROGRAM = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
FLAGS = [
    '--headless=new',
    '--no-sandbox',
    '--disable-gpu',
    '--remote-debugging-port=0',
    '--remote-allow-origins=*',
    '--hide-scrollbars',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-dev-shm-usage',
]


class Chrome:
    def __init__(self):
        import websocket
        self.folder = tempfile.mkdtemp()
        self.process = subprocess.Popen(
            [PROGRAM, *FLAGS, f'--user-data-dir={self.folder}', 'about:blank'], stderr=subprocess.PIPE, text=True
        )
        port = next(m[1] for line in self.process.stderr if (m := re.search(r'ws://127\.0\.0\.1:(\d+)', line)))
        tab = next(t for t in json.load(urllib.request.urlopen(f'http://127.0.0.1:{port}/json')) if t['type'] == 'page')
        self.socket = websocket.create_connection(tab['webSocketDebuggerUrl'], timeout=3600)
        self.count, self.events = itertools.count(1), []
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self(f'{domain}.enable')

    def __call__(self, method, **params):
        k = next(self.count)
        self.socket.send(json.dumps(dict(id=k, method=method, params=params)))
        while (m := json.loads(self.socket.recv())).get('id') != k:
            self.events.append(m)
        if 'error' in m:
            raise RuntimeError(f'{method}: {m["error"]}')
        return m['result']

    def js(self, code):
        r = self('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in r:
            raise RuntimeError(r['exceptionDetails'])
        return r['result'].get('value')

    def open(self, url):
        "Load a page and wait until it and its scripts are there."
        self.events.clear()
        self('Page.navigate', url=url)
        end = time.time() + 3600
        while (
            not any(e['method'] == 'Page.loadEventFired' for e in self.events)
            or self.js('document.readyState') != 'complete'
        ):
            if time.time() > end:
                raise TimeoutError(url)
            self.js('1')
            time.sleep(.01)

    def look(self, width=1280, height=900, dark=False):
        self('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self(
            'Emulation.setEmulatedMedia',
            features=[dict(name='prefers-color-scheme', value='dark' if dark else 'light')],
        )

    def complaints(self):
        "Console errors and exceptions since the page was opened, and addresses of other hosts that were asked for."
        said = [
            e['params']['entry']['text']
            for e in self.events
            if e['method'] == 'Log.entryAdded' and e['params']['entry']['level'] == 'error'
        ]
        said += [
            str(e['params'].get('args'))
            for e in self.events
            if e['method'] == 'Runtime.consoleAPICalled' and e['params']['type'] == 'error'
        ]
        said += [
            e['params']['exceptionDetails'].get('text') for e in self.events if e['method'] == 'Runtime.exceptionThrown'
        ]
        asked = [e['params']['request']['url'] for e in self.events if e['method'] == 'Network.requestWillBeSent']
        return said + [u for u in asked if not u.startswith(('file:', 'data:', 'blob:'))]

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
